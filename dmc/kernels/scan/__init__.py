"""The merge of eq. 9, over whole sequences."""

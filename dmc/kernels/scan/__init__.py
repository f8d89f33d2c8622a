"""The merge of eq. 9."""

"""What a retrofit did: figures of training, of the compression per head, of the merged segments of a text."""

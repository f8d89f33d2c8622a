"""What a retrofit did: pictures of training, of the compression per head, of the merged segments of a text."""

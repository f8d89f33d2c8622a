"""The model code that is copied into every exported directory; needs torch and transformers alone."""

"""The networks themselves, imported when they are built: a configuration is checked without PyTorch."""

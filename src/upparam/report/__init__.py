"""Facts to terminal text, JSON and HTML: the same findings in each."""

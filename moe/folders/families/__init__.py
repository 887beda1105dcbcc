"""Model families: how the folders of other libraries say what our configuration says."""

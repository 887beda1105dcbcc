"""How experts are read: threads, page cache or not, and what their bytes should be."""

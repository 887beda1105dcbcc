"""Model families: our configuration in the ``config.json`` of other libraries, and back."""

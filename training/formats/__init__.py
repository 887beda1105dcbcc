"""What ``data.format`` names: the ``data`` section of each kind of data."""

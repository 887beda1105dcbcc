"""Routes as data: the file format, recording, reading back and replay."""

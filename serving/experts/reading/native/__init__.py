"""Reads of experts in C++, without Python's lock."""

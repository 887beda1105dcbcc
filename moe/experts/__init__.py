"""A layer's experts: their interface, their memory, and the path of rows through them."""

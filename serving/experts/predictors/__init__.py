"""Which experts the next layers will need, before their routers have chosen: one file per rule."""

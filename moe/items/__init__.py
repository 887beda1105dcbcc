"""Items as short sequences of codes: semantic ids, their table, and what may follow a prefix."""

"""Serving: expert store, engine, OpenAI API, the Ray Serve application."""

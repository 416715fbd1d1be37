"""`uniapl collect`: expert demonstrations from an OpenAI-compatible chat endpoint."""

"""Expert demonstrations from an OpenAI-compatible chat endpoint: `uniapl collect`."""

"""The server: an OpenAI- and Anthropic-compatible API and a chat page over the engine, in one process without torch; each
model runs in a process of its own."""

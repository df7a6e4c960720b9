"""The server: the APIs of OpenAI and Anthropic and a chat page, in one process without torch; each model runs in a
process of its own."""

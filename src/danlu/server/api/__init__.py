"""The APIs of OpenAI and Anthropic, and what others added to them."""

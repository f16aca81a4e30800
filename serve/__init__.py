"""The HTTP wrapper around an engine: DeepSeek's, OpenAI's and Anthropic's interfaces."""

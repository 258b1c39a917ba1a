"""The web server: OpenAI-compatible endpoints and the chat page. It knows no tensor; worker.py talks to the engine."""

"""The HTTP side: OpenAI-compatible endpoints, sessions, weights, metrics, and the client of the engine
process.
"""

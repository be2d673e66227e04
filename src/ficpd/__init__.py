"""Federated In-Context Prompt Distillation: adapt one frozen backbone together, share only soft prompts."""

__version__ = "0.1.0"

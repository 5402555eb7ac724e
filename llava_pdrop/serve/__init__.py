"""People use a model: a conversation in the terminal (`chat.py`). One answer of one conversation: `conversation.py`."""

"""What a chat record says: messages, calls, tools, flags, and the fields beside them.

May import: the ground, `jllm.data.sources`.
"""

"""What each call means: messages in, messages out; no sockets."""

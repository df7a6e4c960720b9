"""What the chat page keeps."""

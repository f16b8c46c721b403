"""The web page for exploring fits and checkpoints. Only ``page`` imports Gradio."""

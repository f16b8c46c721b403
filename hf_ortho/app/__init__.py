"""The web page: fits of activations, and the activations of a checkpoint. Gradio is imported by ``page`` alone."""

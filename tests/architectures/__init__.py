"""Every architecture of the installed transformers, tiny: does it convert, save, reload and run the same?"""

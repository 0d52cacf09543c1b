"""Which results can be relied upon?"""

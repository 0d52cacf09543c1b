"""What methods of several kinds compute with, the library's and yours: an optimiser, a clustering, overlapping work.

What methods of one folder share lies there, in a file whose name begins with an underscore.
"""

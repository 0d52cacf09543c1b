"""What should replace the mean?"""

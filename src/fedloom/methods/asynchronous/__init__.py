"""What if the server does not wait for the slowest?"""

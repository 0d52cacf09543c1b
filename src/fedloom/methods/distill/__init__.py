"""What can be learned from models instead of data?"""

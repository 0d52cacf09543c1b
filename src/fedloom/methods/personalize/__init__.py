"""What should each client own?"""

"""What if data are linked: columns of one table, nodes of one graph?"""

"""The local page about the runs below a folder (`distill ui`): a list, and the report of each run, kept up to date"""

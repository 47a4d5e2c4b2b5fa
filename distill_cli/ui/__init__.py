"""The page of `distill ui`: a list of the runs below a folder, and the report of each, kept up to date."""

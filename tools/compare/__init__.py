"""Compares configs at equal training time: see ``python -m tools.compare --help``.

configs     what a config becomes for a cell: its length, seed, rate and identity
records     what is kept of a run: what an update costs, what it trained and scored
claims      which of several processes trains a cell
cells       finished cells, kept in a folder, and the one way to get another
archive     what finished cells came to, in one file that outlives the folder
measure     calibrates and trains, and reads what came of it
prepare     compiles what is compared, several programs at the same time
metrics     the figures to compare by, and where they are found
rows        what is compared, and a cell as the tables have it
comparison  which cells a comparison needs, in which order
statistics  curves of score against cost, and the time to a score
summary     means, spreads and times to score
groups      scores by group, one config beside the other
search      successive halving over config keys
workers     several processes of one command on one folder
table       all of it in Markdown
plot        and as a picture
"""

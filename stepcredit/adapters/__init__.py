"""The credit of this package inside other trainers.

`rows`: padded rows in, advantages for every token out; of all libraries it needs torch alone.
"""

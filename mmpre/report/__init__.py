"""`mmpre report`: one page of HTML that tells what runs did and what they learned, and needs nothing but a browser.

account      what was run, how to run it again, its state, what was lost on the way
curves       metrics.jsonl as charts; chart lays one out for the page
differences  where several runs differ
panels       what the weights make of held-out rows, by what objectives, heads and modalities can show
comparison   two ways over seeds beside each other, as a picture by itself (mmpre claim)
page         everything together, into one file
"""

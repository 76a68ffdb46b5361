"""The report of an audit: audit.json, audit.html and audit.pdf.

document   audit.json to dataclasses and back
blocks     what a report is made of
wording    numbers and verdicts in words
gallery    samples beside the patients that they resemble, for the site's own copy
charts     ROC, AUC and ε as marks in a plane
content    the report, once
annex      limits, glossary, and input to the controller's impact assessment
html       the content as one self-contained file
pdf        the same on paper
"""

"""What the method is applied to: a domain is one file here, and `DOMAIN=NAME bash run.sh` runs it.

The method needs prompts, a judge that says where a trace turns, and sentences that turn it back.
A file NAME.py holds

    PROMPTS, TRIGGERS, JUDGE, EVAL, RUN, ...   texts: the defaults of run.sh's variables
    Judge       a class; the table above LABELS in intervene.py says what it answers
    WORDS       {phrase of the report: what this domain says instead}; {} keeps them all
    GLOSSARY    [(word, meaning)] for the report, in the domain's own words

A domain without BENIGN has no stage 2. The texts that OF_ITS_MODEL
in `domains/__main__.py` names hold for the domain's own MODEL alone.
"""

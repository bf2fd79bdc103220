"""From desired and observed state to a plan, and from the plan to the models that are served.

`plan` and `backoff` are pure; `reconciler` is the loop that acts; `status` says what is going on.
"""

"""From desired and observed state to a plan, and from the plan to the models that are served.

`plan` and `backoff` are pure; `turns` carries out what is planned, and `reconciler` is the loop of turns;
`status` says what is going on.
"""

"""A served policy on an arm: a control loop with limits, adapters, recording, and a simulated Franka.

`base` is the contract of an arm, `limits` what it may be asked to do, `stopping` what ends a run whatever
else happens, `cameras` the pictures, `schedule` how chunks follow one another, `asking` the way to the
server, `runner` the loop. `serl` and `lerobot` are adapters; `simulated` is an arm in MuJoCo, which
`endpoints` puts behind the HTTP interface of a real one, and `faults` makes things go wrong on purpose.
"""

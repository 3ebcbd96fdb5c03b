"""The mathematics of diffusion: tensors and functions that know no network, no trainer and no file.

| module | answers |
|---|---|
| `schedule` | how much signal and noise ``x_t`` holds, and which pairs ``(t, t_prev)`` a chain walks; discrete time |
| `continuous` | the same in continuous time: flow, EDM |
| `prediction` | what a network output says about ``x0`` and ``eps`` |
| `process` | which schedule a description means, and which prediction type goes with it |
| `posterior` | the step back when x0 is known, and the variational term of a learned variance |
| `weighting` | how much the loss at each noise level counts |
| `samplers` | how ``x`` at ``t`` becomes ``x`` at ``t_prev`` |
| `guidance` | how the predictions under several conditions become one |
| `noise` | which random numbers a sample gets |
"""

import pytest, torch
from emulated_cuda import emulated_cuda

@pytest.fixture
def cuda():
    with emulated_cuda() as own: yield own

def test_refuses(cuda):
    x, y = torch.randn(3, 4).to("cuda:1"), torch.randn(3, 4)
    assert x.device == torch.device("cuda:1") and x.is_cuda and x.device.type=="cuda"
    for wrong in (lambda: x + y, lambda: x @ y.T, lambda: torch.cat([x, y]), lambda: x + x.to("cuda"), lambda: y * x.sum(), lambda: torch.stack([x.sum(), y.sum()]),
        lambda: torch.rand(3, generator=torch.Generator("cuda:1")), lambda: torch.rand(3, device="cuda:1", generator=torch.Generator()), lambda: torch.rand(3, device="cuda:1", generator=torch.Generator("cuda")),
        lambda: torch.zeros(1, device="cuda:2")):
        with pytest.raises(RuntimeError): wrong()
    with pytest.raises(TypeError): x.numpy()
    z = x + y.sum()
    assert z.device == x.device and torch.where(x>0,x,0.0).device == x.device
    assert torch.rand(3,device="cuda:1",generator=torch.Generator("cuda:1").manual_seed(1)).tolist()==torch.rand(3,generator=torch.Generator().manual_seed(1)).tolist()

def test_counts(cuda):
    x = torch.randn(3, 4).to("cuda:1"); m = x > 0
    for n, f in ((1, lambda: x.sum().item()), (1, lambda: bool(x.sum())), (1,lambda: x.tolist()),(1,lambda: x[m]),(0,lambda: x.masked_fill(m,0.)),(1,lambda:x.nonzero()),(1,lambda:torch.ones(3).to("cuda:1")),(0,lambda:torch.ones(3).pin_memory().to("cuda:1",non_blocking=True)),
      (1,lambda:torch.ones(3).pin_memory().to("cuda:1")),(1,lambda: x.cpu()),(1,lambda:torch.repeat_interleave(torch.ones(3,dtype=torch.int64,device="cuda:1"))),(0,lambda:torch.repeat_interleave(torch.ones(3,dtype=torch.int64,device="cuda:1"),output_size=3)),
      (1,lambda:torch.equal(x,x)),(1,lambda:x[torch.tensor([0,1])]),(0,lambda:x.to("cuda:1")), (0,lambda:x.clone().index_put_((m,),torch.zeros((),device="cuda:1"))),(1,lambda:torch.tensor(1.,device="cuda")),(0,lambda: torch.full((2,),1.,device="cuda")),(0,lambda: x.clone().__setitem__(m,1.0)),(0,lambda: x.clone().__setitem__(0,1.0))):
        with cuda.counted() as w: f()
        assert sum(w.values())==n,(n,w)
def test_grad(cuda):
    lin=torch.nn.Linear(4,5); p=lin.weight; lin.to("cuda:1"); assert p is lin.weight and p.device==torch.device("cuda:1")
    o=torch.optim.Adam(lin.parameters(),fused=True)
    x=torch.randn(3,4,device="cuda:1")
    with torch.autocast("cuda",torch.bfloat16): 
        y=lin(x); assert y.dtype==torch.bfloat16
    y.float().square().mean().backward(); assert p.grad.device==p.device
    o.step()

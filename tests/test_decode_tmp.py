import torch, pytest
from kit import models
from kit.decode import Request, decode
from kit.schema import Sampling

@pytest.mark.parametrize("shape", ["llama","qwen3","gemma3"])
def test_eq(shape):
    m=models.load(f"random:{shape}",dtype="float32")
    g=torch.Generator().manual_seed(0)
    reqs=[Request(tuple(torch.randint(1,256,(int(n),),generator=g).tolist())) for n in torch.randint(1,60,(11,),generator=g)]
    out=decode(m,reqs,Sampling(max_new_tokens=50),batch_size=4)
    for r,o in zip(reqs,out):
        ids=torch.tensor([r.prompt_ids])
        ref=m.weights.generate(ids,attention_mask=torch.ones_like(ids),max_new_tokens=50,do_sample=False)[0,len(r.prompt_ids):].tolist()
        assert list(o.token_ids)==ref
        assert len(set(ref))>5

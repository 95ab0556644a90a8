"""The dashboard's page: style and script in the file itself, nothing fetched."""

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}}
section{{border-top:1px solid #ddd;padding:.6rem 0}} h2{{font-size:1.05rem;margin:.2rem 0}} p{{margin:.2rem 0}}
li,code{{font:13px/1.6 ui-monospace,monospace;white-space:pre-wrap}} code{{background:#f2f2f2;padding:0 .2em}}
mark{{background:rgba(0,114,178,calc(.12 + .6*var(--a)));color:inherit}}
.none,.effect{{color:#555}} .hidden{{display:none}}
</style></head><body><h1>{title}</h1><p>{text}</p>
<p><label>Search <input id="search" type="search"></label> <label>Order <select id="order"><option value="page">as drawn
</option><option value="rare">rarest first</option><option value="common">most common first</option></select></label>
<output id="count"></output></p><main>{cards}</main><script>
const main=document.querySelector("main"),all=[...main.children],search=document.getElementById("search"),
order=document.getElementById("order"),sign={{page:0,rare:1,common:-1}};
function show(){{const word=search.value.toLowerCase();let n=0;
[...all].sort((a,b)=>sign[order.value]*(a.dataset.density-b.dataset.density)).forEach(s=>{{
const hit=s.textContent.toLowerCase().includes(word);s.classList.toggle("hidden",!hit);n+=hit;main.append(s)}});
document.getElementById("count").textContent=n+" of "+all.length+" latents shown"}}
search.oninput=order.oninput=show;show()</script></body></html>
"""

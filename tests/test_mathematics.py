"""Verdicts on numbers and formulas, in families: of each way to write an answer what has to pass, and what must not."""

import json
import logging
from functools import partial

import pytest
from conftest import seconds_of, shared

from rewards import judge, mathematics

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody times it


def jsonl(*parts):
    return map(json.loads, shared(*parts).open())


def disagreements(verifier, rows, completion="{}"):
    """The answers of [(ground truth, right answers, wrong answers), ...] that are judged otherwise."""
    found = []
    for gold, right, wrong in rows:
        for expected, answers in ((1.0, right), (0.0, wrong)):
            for answer in answers:
                verdict = judge(verifier, completion.replace("{}", answer), gold)
                if verdict.reward != expected:
                    found.append((gold, answer, expected, verdict.reason))
    return found


MATH = {  # family: (ground truth, right answers, wrong answers)
    "named left sides": [
        ("(1,2)", ["(x,y)=(1,2)", "(x, y) = (1, 2)", r"\left(x,y\right)=\left(1,2\right)", "x=1, y=2"],
         ["(x,y)=(2,1)", "(1,2)=(2,1)"]),
        ("5", ["f(2)=5", "x+y=5", r"\overline{AB}=5", "|AB|=5", r"\text{Area}=5", "AB = 5", "a_{10}=5",
          r"\lfloor x\rfloor=5", r"P(A\cap B)=5", "2+3=5", "x=2+3=5", r"\mathrm{Area}=5", r"\triangle ABC = 5",
          "[ABC]=5", r"\frac{a}{b}=5", "x^2+y^2=5", "f^{-1}(3)=5", r"\mathbf{x}=5", r"\text{Area} = 5\text{ cm}^2",
          "n(A)=5"],
         ["f(5)=2", "5=f(2)=6", "5=6", "x=5=6", "x=6=5", r"\text{Area}=6", "x+5=7", "5x=10", r"\text{Area}=5, 6",
          "x=5,y=6", r"x\ne 5", "x>5", r"x = 5 \text{ or } x = 6", "f(2)=5+1"]),
        ("30", [r"\angle ABC=30^\circ", r"m\angle A = 30^{\circ}", r"\angle ABC = 30\text{ degrees}", "∠ABC = 30°"],
         [r"\angle ABC=60^\circ", r"\angle 30 = 60"]),
        (r"\frac12", [r"\sin\theta=\frac12", "P(A)=0.5", r"\cos 60^\circ=\frac{1}{2}"],
         [r"\sin\theta=\frac13", r"\sin\frac12"]),
        ("2x+3", ["f(x)=2x+3", "y=2x+3", "y=3+2x"], ["y=2x-3", "2x+3=0"]),
        ("f(2)=5", ["5", "f(2)=5"], ["6", "f(2)=6"]),
        ("x=5", ["5", "x=5", "x=2+3=5"], ["y=5", "6", "x=6", "x=7=5", "x=5=7"]),
        ("a_5=7", ["7", "a_5=7"], ["8"]),
    ],
    "intervals": [
        ("[1,3)", [r"1\le x<3", r"1 \leq x < 3", r"3>x\ge 1", r"x \in [1,3)", r"x\ge 1\text{ and }x<3",
          r"\{x\mid 1\le x<3\}", "1≤x<3"],
         ["1<x<3", r"1\le x\le 3", r"x\ge1", "x<3", r"x\ge 1\text{ or }x<3", "[1,3]", "(1,3)"]),
        (r"(-\infty,3]", [r"x\le 3", r"3\ge x", r"x\leq 3", r"(-\infty, 3]", r"-\infty<x\le 3"],
         ["x<3", r"x\ge 3", "3", r"2x\le 6"]),
        (r"(-\infty,-1)\cup(1,\infty)", [r"x<-1\text{ or }x>1", "x < -1 or x > 1", r"x>1 \lor x<-1",
          r"x<-1 \cup x>1"],
         [r"x<-1\text{ and }x>1", "-1<x<1", "x<-1", "|x|>1"]),
        (r"(-\infty,2)\cup(2,\infty)", [r"x\ne 2", "x≠2"], [r"x\ne 3", "x=2"]),
        ("x>3", [r"(3,\infty)", "x>3", "3<x"], [r"x\ge 3", "3"]),
        (r"\{1,2\}", ["1,2"], ["1<x<2", r"1\le x\le 2"]),
        (r"\varnothing", [r"\emptyset", "∅", r"\{\}", r"\{ \}"], ["0", r"\{0\}", r"\{\emptyset\}"]),
        (r"\emptyset", [r"\varnothing", "∅"], ["0"]),
    ],
    "mixed": [
        (r"\frac{71}{6}", ["11 5/6", r"11\frac{5}{6}", r"11\frac56", r"11\ \frac{5}{6}", r"11~\frac{5}{6}", "71/6",
          r"11\dfrac56", r"11\,\frac56"],
         ["11", "5/6", r"\frac{55}{6}", "16/6", "11 + 5/6"]),
        ("2.5", ["2 1/2", r"2\frac{1}{2}", "2½", "5/2", r"2\tfrac12"],
         ["2", "1", "1/2", "21/2", r"\frac{21}{2}", "3/2"]),
        (r"-\frac{5}{2}", [r"-2\frac12", "-2 1/2"], [r"-\frac32", "2 1/2"]),
        (r"\frac{22}{3}", [], ["4 10/2"]),
        ("2", [], ["2 2/3", "2 1/2"]),
    ],
    "powers": [
        ("1500", [r"1.5\times 10^{3}", r"1.5\cdot 10^3", "1.5e3", "1.5 x 10^3", "1.5×10³", r"15\times10^2", "1,500",
          "1{,}500", r"1.50\times 10^3"],
         [r"1.5\times 10^{2}", "1.5", r"3\times 500", r"1.5\times 10^{3}+1", r"1.5\times 10^{-3}"]),
        ("0.00032", [r"3.2\times 10^{-4}", r"3.2\cdot10^{-4}", "3.2e-4"], [r"3.2\times10^{-5}", "0", "0.0003"]),
        (r"6.02\times 10^{23}", [r"6.02\cdot 10^{23}", "602000000000000000000000"], [r"6.02\times 10^{22}"]),
        ("1000", ["10^3"], ["10^4"]),
    ],
    "tiny": [
        ("0", ["0", "0.0", "-0"],
         ["0.0000001", "10^{-9}", r"1\times 10^{-8}", "e^{-50}", r"\frac{1}{10^{12}}", "0.00000000001"]),
        ("0.0000002", ["0.0000002", r"2\times10^{-7}", "0.00000020"],
         ["0.0000001", "0.0000003", "0", r"1\times10^{-7}"]),
        ("e^{-50}", ["e^{-50}", r"\frac{1}{e^{50}}"], ["e^{-51}", "0"]),
        (r"\frac13", ["0.333333333", "0.3333333"], ["0.33", "0.3334", "0.3"]),
        ("123456789", ["123456789.0"], ["123456788", "123456789.5"]),
    ],
    "units": [
        ("5", [r"5\text{ cm}", r"5~\mathrm{m/s}", r"5\ \text{m}", r"5\,\mathrm{cm}^{2}", r"5\text{ cm}^2",
          r"5 \text{ square units}", "5 cm", "5cm", "5 m", r"5\mbox{ inches}", r"5{\rm\ cm}", r"\text{5 cm}",
          r"5\text{ m}/\text{s}", r"5\text{ apples}", "5 apples", "5 eggs", r"5\ \mathrm{kg\cdot m/s^2}",
          r"5\text{ m/s}^2", r"\$5", r"5\%", r"5\text{ dollars}", "5 km/h", r"5\text{ ft}^{3}", r"5^\circ\text{C}",
          r"5\text{ cents}", r"5 \text{ units}^2", r"5\text{ hours}", "5 hours", r"5\;\text{edges}"],
         [r"6\text{ cm}", "5x", "5n", r"5\text{ or }6", r"5\text{ hundred}", r"5\pi", "5 million", "5 dozen",
          r"5\text{ thousand}", "5!", r"5\text{ (or 6)}", r"5\text{ cm or }6\text{ cm}", "5k"]),
        (r"5\text{ cm}", ["5", r"5\text{ centimeters}", "5 cm", r"5\mathrm{cm}", "5 centimetres"],
         [r"5\text{ m}", r"5\text{ inches}", r"5\text{ cm}^2", r"5\text{ km}", r"6\text{ cm}", r"5\text{ seconds}",
          r"50\text{ cm}"]),
        (r"12\text{ square feet}", ["12", r"12\text{ ft}^2", r"12\text{ sq ft}", r"12\text{ feet}^2",
          r"12\text{ feet squared}", r"12\text{ square units}"],
         [r"12\text{ ft}", r"12\text{ cubic feet}", r"12\text{ square inches}", r"12\text{ m}^2"]),
        (r"60\text{ mph}", ["60", r"60\text{ miles per hour}", r"60\text{ mi/h}", "60 mph"],
         [r"60\text{ km/h}", r"60\text{ miles}", r"60\text{ m/s}"]),
        (r"\$5", ["5", r"5\text{ dollars}", r"\$5.00", "$5"], [r"5\text{ cents}", r"\$6", r"5\text{ euros}"]),
        (r"25^\circ", ["25", r"25\text{ degrees}", "25°"], [r"25\text{ radians}", "26"]),
        (r"25^\circ\text{C}", ["25", r"25^\circ", "25°C", r"25\text{ degrees Celsius}"], [r"25^\circ\text{F}"]),
        ("4t", ["4t"], ["4", "t"]),
        ("4ab", ["4ab", "4ba"], ["4", "4a"]),
        ("5m", ["5m", "m5"], ["5", "5n"]),
        (r"3\pi\text{ cm}", [r"3\pi", r"3\pi\text{ cm}", r"3\pi\text{ centimeters}", "3π cm"],
         ["3", r"3\pi\text{ m}"]),
        ("x", ["x"], ["y", "1"]),
    ],
    "choice": [
        (r"\text{(C)}", [r"\textbf{(C)}\ 12", r"\text{C}", "C", "(C)", r"\textbf{(C) }12", r"\mathrm{(C)}\,12",
          "C) 12", r"\text{(C) }12", r"\boxed{C}", "C."],
         [r"\textbf{(D)}\ 12", "12", "D", r"\text{(A) or (C)}", "A, C", "(A)(C)", r"\text{not C}"]),
        ("12", [r"\textbf{(C)}\ 12", "(C) 12", r"\text{(C)}\ 12", r"\textbf{(C)}\,12"],
         ["(C)", r"\textbf{(C)}\ 13", "(12) 13"]),
        (r"\textbf{(C)}\ 12", ["C", "12", "(C)", r"\textbf{(C)}\ 12"], ["D", r"\textbf{(D)}\ 12", "13"]),
        (r"\text{(A)}", ["(A)", "A) 7"], [r"\text{(A) or (C)}", "(A)(C)", "(A), (C)", "A) or B)", "(A) and not (C)", "B"]),
        (r"\text{A,D}", [r"\text{A,D}", "A,D", r"\text{A, D}"], ["A", "D"]),
        (r"\text{Yes}", ["yes", r"\text{yes}", "Yes", r"\textbf{Yes}"], ["no", r"\text{No}"]),
    ],
    "clock": [
        (r"2:30\text{ PM}", [r"\text{2:30 PM}", "2:30 PM", r"2:30\ \text{p.m.}", r"\text{2:30 p.m.}", "14:30",
          r"2:30\text{ pm}", "2:30"],
         [r"2:30\text{ AM}", "2:30 a.m.", "2:31 PM", "3:30 PM", "2", "15", r"\frac{1}{15}"]),
        (r"9\text{ a.m.}", ["9 am", r"9\text{ AM}", r"9{:}00\text{ AM}", "9:00 a.m."], [r"9\text{ p.m.}", "10 am"]),
        ("12:00", ["12:00"], ["12:30", "1:00", "12"]),
        ("3:2", ["3:2"], ["2:3"]),
        (r"\text{4:30 p.m.}", ["4:30 pm", r"\text{4:30 PM}"], ["4:30 am", "16", "4"]),
    ],
    "bases": [
        ("1011_2", ["1011", "1011_2", "1011_{2}", r"1011_{\text{two}}"],
         ["1011_3", "1011_{10}", "1010_2", "11", "1101_2", "11_{10}"]),
        ("2516_8", ["2516", "2516_8", "2516_{8}", "n = 2516_8"], ["2516_9", "2516_7", "6152_8"]),
        ("7", ["7_{10}", "7"], ["7_8", "7_9", "5_7"]),
        ("2AF_{16}", ["2AF", "2AF_{16}"], ["2FA", "2FA_{16}", "2AF_{17}"]),
        ("40_9", ["40_9", "40"], ["58_9 - 18_9", "40_{10}", "36"]),
    ],
    "approx": [
        ("5", [r"\approx 5", r"x\approx 5", "≈5"], ["5≈6", r"5\approx 7", r"6\approx 5", r"x\approx 6", "5≈5.1"]),
        (r"\sqrt2", [r"\sqrt{2}\approx 1.414", r"x=\sqrt2\approx1.41", "√2≈1.414"],
         [r"\approx 1.414", r"\sqrt2\approx 1.5", r"\sqrt3\approx 1.732"]),
        ("3.14", [r"\pi\approx 3.14", r"x\approx 3.14"], [r"\pi\approx 3.142", r"3\approx 3.14"]),
    ],
    "unicode": [
        (r"\frac12", ["½", "0.5", "１/２"], ["⅓", "12", "1½"]),
        ("42", ["４２", "٤٢", "42"], ["４３", "24"]),
        ("x^2+1", ["x²+1", "1+x²", "x^{2}+1"], ["x2+1", "x³+1", "2x+1"]),
        ("x^{10}", ["x¹⁰"], ["x¹", "x^1"]),
        ("x_1+x_2", ["x₁+x₂"], ["x₁+x₁"]),
        (r"\frac{\pi}{3}", ["π/3"], ["π"]),
        (r"3\sqrt2", ["3√2", "3√(2)"], ["√3"]),
        (r"\frac{5}{2}", ["2½"], ["21/2"]),
        (r"x\ge 2", ["x≥2"], ["x≤2", "x>2"]),
        ("6", ["x = 6"], ["2×3", "12÷2"]),
        (r"\pm 3", ["±3"], ["3"]),
        (r"[0,\infty)", ["[0,∞)"], ["(0,∞)"]),
    ],
    "undone": [
        ("3", ["3", "x=3"],
         [r"\sqrt[3]{27}", r"\sqrt{9}", r"\ln e^3", r"\log 1000", r"\log_{10}1000", r"\lfloor 3.7\rfloor",
          r"\lceil 2.1\rceil", "|-3|", r"\left|-3\right|", "3!-3", "1+2", r"\frac{1+5}{2}", "9^{1/2}", r"\gcd(6,9)",
          "gcd(6,9)", r"\max(1,3)", r"\text{lcm}(1,3)", r"\int_0^3 dx", r"\binom{3}{1}", "4-1", r"6\div 2",
          r"\det\begin{pmatrix}3\end{pmatrix}", r"\sqrt{4+5}", r"\sin 90^\circ + 2", "|3+0i|", "(1+2)", "i^2+4",
          r"3\cdot 1", r"\operatorname{lcm}(1,3)", r"10 \bmod 7", r"\phi(4)+1", r"1+1+\cdots+1"]),
        (r"\frac34", ["0.75", "3/4", r"\frac{6}{8}", r"75\%"],
         [r"\frac12+\frac14", r"1-\frac14", r"\frac{1+2}{4}", r"3\cdot\frac14", r"\frac{3}{2}\cdot\frac12",
          "1/2+1/4", r"\sin^2 60^\circ", r"\frac{\sqrt9}{4}", r"3 \div 4", r"\frac{\binom{3}{1}}{4}"]),
        ("6+9i", ["6+9i", "9i+6"], ["(1+2i)6-3i", "3+3+9i", "3(2+3i)-0", "(3+3i)(1+i)+6+3i"]),
        ("11-2i", ["11-2i"], ["(3+4i)(1-2i)"]),
        ("-4", ["-4"], ["(1+i)^4"]),
        ("i", ["i"], ["i^{17}", "i^5"]),
        ("15x-80", ["15x-80", "-80+15x", "5(3x-16)"], ["19x+1-4x-81"]),
        ("2k+2", ["2(k+1)", "2k+2"], ["(-k+4)+(-2+3k)", "k+k+2"]),
        ("5r^5", ["5r^5"], [r"\frac{(10r^3)(4r^6)}{8r^4}", r"5r^2\cdot r^3"]),
        (r"\cot x", [r"\cot x", r"\frac{\cos x}{\sin x}", r"\frac{1}{\tan x}"],
         [r"\frac{\sec x}{\sin x}-\frac{\sin x}{\cos x}"]),
        (r"-\frac{\pi}{6}", [r"-\frac{\pi}{6}"], [r"\arcsin\left(-\frac12\right)"]),
        (r"2\sqrt3", [r"\sqrt{12}", r"2\cdot\sqrt3", r"\frac{6}{\sqrt3}"], [r"\sqrt3+\sqrt3", "2", r"\sqrt{3}"]),
        (r"\begin{pmatrix}3\\7\end{pmatrix}", [r"\begin{pmatrix}3\\7\end{pmatrix}"],
         [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1\\1\end{pmatrix}",
          r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}2\\5\end{pmatrix}"]),
        ("2x", ["2x"], [r"\frac{d}{dx}x^2", r"\int 2\,dx"]),
        (r"1+\sqrt2", [r"\sqrt2+1", r"\frac{2+2\sqrt2}{2}"], [r"\frac{1}{2}+\frac{1}{2}+\sqrt2"]),
        (r"(5,\infty)", ["x>5"], [r"\frac{1}{x-5}>0", "2x>10"]),
        (r"\log_2 3", [r"\frac{\ln 3}{\ln 2}"], [r"\log_2 5"]),
        ("120", ["120"], ["5!", r"5\cdot4\cdot3\cdot2\cdot1", "10^2+20", r"\frac{6!}{6}"]),
    ],
    "more": [
        ("1011_2", ["(1011)_2"], ["(1011)_3"]),
        ("x+1", ["1+x", "(x+1)"], [r"\frac{x^2-1}{x-1}", r"\frac{x^2+x}{x}", "x+2-1", "x+x+1-x"]),
        (r"\frac{1}{x}", ["x^{-1}", r"\frac{2}{2x}"], ["x"]),
        ("1234", ["1 234", r"1\ 234", r"1\;234", r"1\,234"], ["234", "1 235", "1", "1.234"]),
        ("3.14", ["3,14", "3.14"], ["3,41", "314", "3,14,1"]),
        (r"\mathbb{R}", [r"\text{all real numbers}", r"(-\infty,\infty)", "ℝ"], ["0", r"[0,\infty)"]),
        (r"\emptyset", [r"\text{no solution}", r"\text{no real solutions}"], ["0", r"\text{one solution}"]),
        ("12", [r"\text{Area: }12", r"\text{The answer is }12", r"\text{Area is }12\text{ cm}^2"],
         [r"\text{not }12", r"\text{at least }12", r"\text{Area: }13", r"\text{The answer is not }12"]),
        ("1", ["1"],
         ["(-1)^{1000}", r"\tan 45^\circ", r"\sin^2 x+\cos^2 x", r"7\bmod 3", r"7 \mod 3",
          r"\lim_{x\to0}\frac{\sin x}{x}", "0!"]),
        ("10", ["10"], ["C(5,2)", "{}_5C_2", "P(10,1)", r"5\choose 2"]),
        (r"\pi", [r"\pi", "π"], [r"\arccos(-1)", r"4\arctan 1", r"\frac{22}{7}", "3.14159"]),
        (r"\langle 1,2\rangle", [r"\langle 1,2\rangle"], [r"\langle 2,1\rangle"]),
        ("x=9", ["9", "x=9"], [r"\log_{\sqrt[3]{5}}125", r"x=\sqrt{81}", "y=9"]),
        ("(3,4)", [r"x=3\text{ and }y=4", "x=3, y=4"], ["x=4,y=3"]),
        ("0", ["x=0", "0"], ["2x^2+3x-5=0", "x^2-2x-3=0"]),
        ("x^2-1", ["x^2-1", "(x-1)(x+1)", "-1+x^2"], ["x^2-2+1", r"x\cdot x-1"]),
    ],
    "several": [
        ("5", ["5"],
         ["5,6", r"5\text{ or }6", "5 or 6", r"\text{5 or 6}", "5; 6", "5 and 6", r"5\quad 6", r"\{5,6\}", r"\pm5",
          r"5 \to 6", "5 5", "5/6", r"5\\6", r"x=5\text{ or }x=6", r"5\text{, not }6", r"\text{either 5 or 6}",
          "5|6", r"5\vee 6"]),
        ("1,2", ["2,1", r"1\text{ and }2", "1 and 2", "x=1,x=2", r"x=1\text{ or }x=2", r"\{1,2\}"],
         ["1", "1,2,3", "x=1", "1,3"]),
        (r"7,-2,\text{ and }-5", ["7,-2,-5", "-5,7,-2", r"-5, -2 \text{ and } 7"], ["7,-2"]),
    ],
    "degrees trig": [
        (r"2\cos 15^{\circ}", [r"2\cos 15^\circ", r"\frac{\sqrt6+\sqrt2}{2}", "2cos 15°"],
         [r"2\cos 15", r"\cos 15^\circ"]),
        (r"\cos 13^\circ", [r"\cos 13^{\circ}", r"\sin 77^\circ"], [r"\cos 13"]),
    ],
    "e": [
        (r"1-\frac{1}{\mathrm{e}}", [r"1-\frac1e", "1-e^{-1}"], [r"1+\frac{1}{\mathrm{e}}"]),
    ],
    "names behind": [
        ("5", ["5=x", "5=AB", "5=f(2)", r"5=\text{Area}", r"\mathrm{P}(X=3)=5", r"2+3=5=x"],
         ["5=x+1", "6=x", "5=x=3", "3=5=x", "x=y"]),
        ("2x+3", ["2x+3=f(x)", "2x+3=y"], ["2x+4=f(x)"]),
    ],
    "words around": [
        ("12", [r"\text{x = 12}", r"\mathbf{AB=12}", r"\mathrm{Area}=\mathrm{12\ cm^2}", r"\text{Area = 12 cm}^2",
          r"\text{The area is 12}", r"\text{The answer is 12.}", r"\text{Rs. }12", "₹12", "12¢"],
         [r"\text{Area = 13}", r"\text{Area = 12 or 13}", r"\text{The area is not 12}", r"\text{The area is 12 or 13}",
          r"\text{13 if x is 12}", r"\text{x is at most 12}"]),
        (r"\text{(B)}", [r"\text{Option B}", r"\text{Choice (B)}", r"\text{The answer is B}"],
         [r"\text{Option A or B}", r"\text{Options A and B}", r"\text{Option C}", r"\text{The answer is not B}"]),
        (r"\text{circle}", [r"\text{a circle}", r"\text{circle.}", r"\text{The circle}", r"\emph{circle}"],
         [r"\text{not a circle}", r"\text{circle or ellipse}", r"\text{an ellipse}", r"\text{a}"]),
        ("3.5", [r"\text{3.5}"], [r"\text{35}"]),
        ("5000000", [r"5\text{ million}", "5 million", r"\text{5 million}", r"5\text{ million dollars}"],
         [r"5\text{ billion}", "5", r"5\text{ millionths}"]),
    ],
    "fonts": [
        (r"\frac12", [r"\mathbf{\frac{1}{2}}", r"\textcolor{red}{\frac12}", r"{\color{red}\frac12}", r"\Large\frac12",
          r"\bf\frac12", r"\bm{\frac12}", r"\underline{\frac12}"],
         [r"\mathbf{\frac{1}{3}}", r"\textcolor{red}{\frac13}", r"\color{red}2"]),
    ],
    "intervals in France": [
        ("(2,5)", ["]2,5[", "(2;5)", r"x\in]2,5["], ["[2,5[", "]2,5]", "[2;5]", "]5,2["]),
        ("[2,5)", ["[2,5["], ["[2,5]", "]2,5["]),
        (r"(-\infty,-1)\cup(1,\infty)", [r"]-\infty,-1[\cup]1,+\infty["], [r"]-\infty,-1]\cup[1,+\infty["]),
        (r"(-\infty,0)\cup(0,\infty)", [r"\mathbb{R}\backslash\{0\}", r"\mathbb{R}\setminus\{0\}"],
         [r"\mathbb{R}\setminus\{1\}"]),
        ("[1,2],[3,4]", ["[1,2],[3,4]"], ["[1,2],[3,5]"]),
    ],
    "vectors": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", ["(1,2)", r"\begin{bmatrix}1\\2\end{bmatrix}", r"\mathbf{v}=(1,2)"],
         ["(2,1)", r"\{1,2\}", "1<x<2", "(1,2,3)", r"\begin{pmatrix}1&2\end{pmatrix}"]),
        ("(1,2)", [r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \\ \end{pmatrix}"],
         [r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\\3\end{pmatrix}"]),
        (r"\begin{pmatrix}2\\4\end{pmatrix}", ["(2,4)"], [r"2\begin{pmatrix}1\\2\end{pmatrix}"]),
    ],
    "repeating": [
        (r"0.\overline{36}", [r"0.\overline{3636}", r"0.\bar{36}", r".\overline{36}", r"\frac{4}{11}"],
         [r"0.\overline{63}", "0.36", r"0.3\overline{6}", r"0.\overline{4}"]),
        (r"\frac{4}{11}", ["4/11"], [r"0.\overline{36}"]),  # the task is to write it as a fraction
    ],
    "percent": [
        ("12.5", [r"12.5\%", r"12.5\text{ percent}"], [r"12.6\%", r"125\%"]),
        (r"33\frac13", [r"33\frac{1}{3}\%", r"\frac{100}{3}\%"], [r"33\%"]),
        (r"\frac12", [r"50\%"], [r"0.5\%", r"\frac12\%"]),
        ("1.5", [r"150\%"], [r"15\%"]),
    ],
    "and": [
        ("5", [], [r"x=3\land x=5", r"x=3\wedge x=5", r"3\wedge 5", r"3\vee 5"]),
        ("(3,5)", [r"x=3\land y=5", r"x=3\wedge y=5"], [r"x=5\land y=3"]),
        ("(1,3)", [r"x>1\wedge x<3"], [r"x>1\vee x<3"]),
    ],
    "signs": [
        ("110_2", ["110_{(2)}", r"110_{\text{base }2}", r"110\text{ (base 2)}", r"110\text{ base two}"],
         [r"110\text{ (base 3)}", "110_{(3)}"]),
        ("BEE_{16}", ["BEE", "BEE_{16}"], ["BED_{16}", "BEE_{15}"]),
        ("3:4", [r"3\colon 4", r"3\text{ to }4"], [r"4\colon 3", r"3\text{ to }5"]),
        ("100000", ["1,00,000", "100,000"], ["1,00,00", "1,00,001"]),
        ("1,10,100", ["10,1,100"], ["1,10"]),
        (r"\log_e 2", [r"\ln 2", r"\log_{e}2"], [r"\log_2 e", r"\ln 3"]),
        ("3", [r"x\equiv 3 \mod 7", r"3\pmod{17}"], [r"10\mod 7", r"x\equiv 4\mod 7"]),
    ],
    "left undone": [
        ("2", ["2"], [r"\frac{1}{\frac{1}{2}}", "-(-2)", "--2", r"\exp(0)+1"]),
        ("e^2", [r"\exp(2)"], []),
        (r"3\sqrt2", [r"\sqrt{18}"], [r"\sqrt{8}+\sqrt{2}"]),
        (r"\sqrt3+2\sqrt2", [r"\sqrt{8}+\sqrt{3}"], []),
        ("4xy", ["4yx", "(x+y)^2-(x-y)^2"], ["2xy+2xy"]),
        ("5x+6", ["6+5x", "(x+2)(x+3)-x^2"], ["5x-6"]),
        ("x^2-2x+5", ["(x-1)^2+4", "x(x-2)+5"], ["(x-1)(x+1)-2x+6-x^2+x^2"]),
        (r"\{1,2,3\}", [r"\{3,2,1\}"], [r"\{1,2\}\cup\{3\}"]),
    ],
}  # fmt: skip

WHOLE = [  # whole completions
    ("12", ["Die Antwort ist 12.", "La réponse est 12.", "La respuesta es 12.", "La risposta è 12.", "A resposta é 12.",
      "Ответ: 12", "答案：12", "答案是12。", "答えは12です。", "답은 12입니다.", "Answer = 12", "The answer is `12`.",
      "<answer>12</answer>", r"\framebox{12}", r"\boxed{\[12\]}"],
     ["Die Antwort ist 13.", "Die Antwort ist nicht 12.", "Die Antwort ist 12 oder 13.", "La respuesta es 12 o 13.",
      "答案是12或13。", "答案不是12。", "답은 13입니다.", "<answer>13</answer>", r"\framebox{13}", "答えは12または13です。"]),
    ("12", ["The answer is 12 because 3 times 4 is 12", "The answer is 12, since 3*4=12.",
      "The answer is 12 (see step 2).", "The answer is 12 as required", "The answer is 12, which is 3 times 4",
      r"The answer is $12$ because $3\cdot4=12$", r"The answer is 12 because $3\cdot 4=12$", "Answer: 12 apples",
      "The answer is 12.", "The final answer is **12**.", "The answer is 12 cm", "So the answer is x = 12.",
      "the answer is: 12", "The answer is 12 (by symmetry)"],
     ["The answer is 12 or 13", "The answer is 13 because 3 times 4 is 12", "The answer is 12 (or 13)",
      "The answer is because 12", "The answer is 12 and 13", "The answer is $13$ because $12$",
      "The answer is 12 and a half"]),
    ("2x+3", ["The answer is f(x) = 2x+3.", "The answer is f(x)=2x+3, because 2", "The answer is $2x+3$"],
     ["The answer is f(x) = 2x."]),
    ("(3,4)", ["The answer is (3,4).", "The answer is (3, 4) since x=3"], ["The answer is (4,3)."]),
    ("42", [r"\boxed{４２}", "The answer is ４２", r"\boxed{42}.", r"$$\boxed{42}$$", r"\boxed{42\ }"],
     [r"\boxed{４３}", r"\boxed{}", r"\boxed{ }"]),
    ("5", [r"\boxed{5\text{ }}", r"\boxed{{5}}", r"\boxed{+5}", r"\boxed{5,}", r"\boxed{\displaystyle 5}",
      r"\boxed{5.00}", r"\boxed{\mathbf{5}}", r"\boxed{\text{ 5 }}", r"\boxed{\textbf{5}}", r"\boxed{5;}",
      r"\boxed{\$5.00}", r"\boxed{5\,}", r"\boxed{\,5}", r"\boxed{5\\}"],
     [r"\boxed{05x}", r"\boxed{5_a}"]),
    (r"\sqrt{13}", [r"\boxed{\sqrt{13}\text{ units}}", r"\boxed{\sqrt {13}}", r"\boxed{AB=\sqrt{13}}",
      r"\boxed{13^{1/2}}", r"\boxed{13^{\frac12}}"],
     [r"\boxed{13}", r"\boxed{\sqrt{31}}"]),
    (r"\{-1\} \cup [0,7)", [r"\boxed{[0,7)\cup\{-1\}}"], [r"\boxed{[0,7)}"]),
    ("x^2+y^2=13", [r"\boxed{x^2+y^2=13}", r"\boxed{y^2+x^2-13=0}"], [r"\boxed{x^2+y^2=12}", r"\boxed{13}"]),
    ("f(2) < f(1) < f(4)", [r"\boxed{f(2)<f(1)<f(4)}"], [r"\boxed{f(1)<f(2)<f(4)}"]),
    (r"x \in [-2,7]", [r"\boxed{[-2,7]}", r"\boxed{-2\le x\le 7}", r"\boxed{x\in[-2,7]}"], [r"\boxed{(-2,7)}"]),
    (r"\frac{1}{2004!}", [r"\boxed{\frac{1}{2004!}}"], []),
    ("3^{2007}", [r"\boxed{3^{2007}}"], [r"\boxed{3^{2006}}"]),
    (r"80\%", [r"\boxed{80}", r"\boxed{80\%}", r"\boxed{80\text{ percent}}", r"\boxed{80%}", r"\boxed{0.8}"],
     [r"\boxed{8}"]),
    ("1,2,3", [r"\boxed{1, 2, 3}", r"\boxed{3,2,1}"], [r"\boxed{123}", r"\boxed{1,2}"]),
    (r"y = -\frac{1}{2} x^2 + 4x - 6", [r"\boxed{y=-\frac12x^2+4x-6}", r"\boxed{-\frac{x^2}{2}+4x-6}"],
     [r"\boxed{y=x^2}"]),
    (r"-\frac{1}{2}", [r"\boxed{\frac{-1}{2}}", r"\boxed{-.5}", r"\boxed{-0.5}", r"\boxed{-\frac{2}{4}}",
      r"\boxed{\frac{1}{-2}}"],
     [r"\boxed{0.5}"]),
    (r"\text{June 20}", [r"\boxed{\text{June 20}}", r"\boxed{June 20}", r"\boxed{\text{june } 20}"],
     [r"\boxed{\text{June 21}}", r"\boxed{20}"]),
    ("ACF", [r"\boxed{ACF}", r"\boxed{\text{ACF}}"], [r"\boxed{ACE}"]),
    (r"\text{even}", [r"\boxed{even}", r"\boxed{\text{even}}", r"\boxed{\text{Even}}"], [r"\boxed{odd}"]),
    ("(-2,1)", [r"\boxed{(-2,1)}", r"\boxed{x=-2,y=1}", r"\boxed{(x,y)=(-2,1)}"],
     [r"\boxed{(1,-2)}", r"\boxed{-2<x<0}"]),
    (r"10\;\text{edges}", [r"\boxed{10}", r"\boxed{10\text{ edges}}"], [r"\boxed{11}"]),
    (r"\infty", [r"\boxed{\infty}", r"\boxed{∞}", r"\boxed{+\infty}"], [r"\boxed{-\infty}", r"\boxed{1}"]),
    (r"\frac{\sqrt{3}}{2}", [r"\boxed{\sqrt{3}/2}", r"\boxed{\frac{\sqrt 3}2}", r"\boxed{\sqrt{\frac34}}",
      r"\boxed{\frac{3}{2\sqrt3}}"],
     [r"\boxed{\sin 60^\circ}", r"\boxed{0.866}"]),
    ("1:2", [r"\boxed{1:2}", r"\boxed{\frac12}", r"\boxed{1 : 2}"], [r"\boxed{2:1}"]),
    ("3+2i", [r"\boxed{3+2i}", r"\boxed{2i+3}", r"\boxed{z=3+2i}"], [r"\boxed{3-2i}", r"\boxed{3+2}"]),
    (r"\mathbb{R}", [r"\boxed{(-\infty,\infty)}", r"\boxed{\mathbb{R}}"], [r"\boxed{(0,\infty)}"]),
    ("6", [r"\boxed{6\text{ ways}}", r"\boxed{n=6}", r"\boxed{6 \pmod{7}}", r"\boxed{x \equiv 6 \pmod{7}}"],
     [r"\boxed{13 \pmod 7}", r"\boxed{13\bmod 7}"]),
]  # fmt: skip

GSM8K = [
    ("18", ["The area is 18 km2.", "She finishes 18 tasks by 5:30.", "答案是18。还剩3个。", "Ответ: 18. Осталось 3.",
      "Die Antwort ist 18. Er hat 3 übrig.", "La respuesta es 18. Le quedan 3.", "It's 18, not 17.", "20 minus 2 is 18"],
     ["17 or 18", "It takes 17-18 days", "17 oder 18", "答案是17或18", "Die Antwort ist 18 oder 19.", "It's 17, not 18.",
      "The answer is 20 minus 2", "The answer is negative 18", "12:18"]),
    ("5", ["He left at 5:00"], ["He left at 5:30", "He left at 2:05"]),
    ("-18", ["minus 18", "negative 18"], ["20 minus 18"]),
    ("1234.5", ["Die Antwort ist 1.234,50 €", "1.234,5"], ["1.2345", "1234.50.5"]),
    ("2.5", ["2 and 1/2 cups"], ["2 and 3/2"]),
    ("-0.5", [r"The answer is $\dfrac{-1}{2}$"], [r"\frac{1}{2}"]),
    ("18", ["18 m2", r"\boxed{18\text{ cm}^2}", r"\boxed{18\,\mathrm{m}^{2}}", r"\boxed{18\text{ m}^3}",
      "The area is 18 m²", "18 ft2", "The answer is 18 (see step 2).", "She makes 18 dollars (see step 2)",
      "The answer is 18. She has 3 left.", "#### 18\n\nLet me know if the 3 steps help.", "#### 18 eggs",
      "#### $18", "The answer is: 18\n\n1. check\n2. done", "Answer: 18 dollars\n\n3. Done", "１８", "答案是１８。",
      "The answer is 3 * 6 = 18.", "The answer is 18 because 3*6=18, not 21-4=17.", "**18**", r"$\boxed{18}$",
      r"\boxed{x=18}", r"\boxed{3\times 6=18}", "The answer is 18, as 3 and 6 are factors.", "The answer is $18$.",
      r"The answer is \(18\).", "The answer is **18** eggs per 2 days", "1. Add 3.\n2. So 18 eggs.", "Step 3: 18",
      "so 18 (step 4)", r"The final answer is $\boxed{18}$ after 2 steps", "A: 18", "<<3*6=18>>18",
      "The answer is 18th", r"Answer: \$18", "answer = 18", "18.0", "18.", "+18",
      "The answer is 18 km/h on 2 roads", r"\boxed{18\text{ ft}^{2}}", "The answer is about 18 in 2 days",
      r"$\boxed{\text{18 eggs}}$", r"\boxed{\$18.00}"],
     [r"\boxed{17, 18}", r"\boxed{17\text{ or }18}", r"\boxed{1 2 3 4 5 18}", r"\boxed{18, 17}",
      r"\boxed{18 \text{ or } 17}", "The answer is 17 or 18", "The answer is 18 or 17.", "The answer is 17, 18",
      "The answer is 17 and 18.", r"\boxed{3\times 6}", r"\boxed{9+9}", "The answer is 17. (18 is wrong)",
      "#### 17\n18 would be too many", "1.8", "1/8", "0.18", "18/2", "18 000", "18,000", "2 1/8", "18 million",
      r"\boxed{18}\boxed{17}", "The answer is 17. She has 18 left.", "18e2", "-18", "180", r"\boxed{18;19}",
      r"\boxed{18/19}", "The answer is 3 * 18", "The answer is 18 + 2"]),
    ("0.5", ["The answer is 1/2", "1/2", r"\boxed{\frac{1}{2}}", r"\boxed{\frac12}", "½", "0.5", ".5", "0,5",
      "5e-1", r"$\dfrac{1}{2}$"],
     ["1", "2", "5", "1/5", "0.05", "21/2"]),
    ("2.5", ["It takes 2 1/2 hours", "2½", r"\boxed{2\frac{1}{2}}", r"\boxed{2 \frac{1}{2}}", "5/2", "2,5", "2.50",
      "10/4"],
     ["1/2", "2", "21/2", "2 1/3", "25"]),
    ("1200000", ["1.2 million", "$1.2 million", "1,200,000", "1 200 000", "1'200'000", "12,00,000", "1.2e6",
      "1.2 x 10^6", r"1.2\times 10^{6}", "1200000", r"\boxed{1{,}200{,}000}", "1 200 000", "1 200 000"],
     ["1.2", "1.2 thousand", "1,200", "12 million", "200000", "1.2 billion"]),
    ("12345", ["12,345", "12 345", "12'345", "12’345", "12 345", "12{,}345", r"12\,345", "$12,345.00"],
     ["345", "12", "12.345", "12,346", "12 3456"]),
    ("12.5", ["Die Antwort ist 12,5", "12,50", "12.5", "25/2", "12 1/2"], ["12,55", "125", "5", "12, 5"]),
    ("1500", ["The answer is 1.5e3", "1.5E3", "1.5 thousand", r"1.5 \times 10^3", "1.5×10³"],
     ["1.5", "3", "15", "1.5e-3"]),
    ("-5", ["-5", "−5", "-$5", "$-5", "The answer is -5.", r"\boxed{-5}"], ["5", "10-5", "3 - 5"]),
    ("123456", ["Rs 1,23,456.", "123,456", "1,23,456"], ["23456", "456"]),
    ("3", ["1,2,3", "so 2 apples and 3.", "3", "3 of 4: 3"], ["3,4"]),
]  # fmt: skip


@pytest.mark.parametrize("family", MATH)
def test_math(family):
    assert disagreements("math", MATH[family], r"So the answer is \boxed{{}}.") == []


def test_math_in_whole_completions():
    assert disagreements("math", WHOLE) == []


def test_gsm8k():
    assert disagreements("gsm8k", GSM8K) == []


def test_all_reported_cases():
    """Built from public complaints about other projects' verifiers."""
    wrong = [
        case
        for case in jsonl("data/verdicts/cases.jsonl")
        if case["verifier"] in ("math", "gsm8k")
        and (judge(case["verifier"], case["completion"], case["ground_truth"]).reward == 1) != case["right"]
    ]
    assert wrong == []


def test_the_last_number_of_published_solutions_is_the_gold_number():
    for row in jsonl("data/gsm8k/test.jsonl"):
        number = row["answer"].rpartition("####")[2].strip()
        assert mathematics.gold_number(row["answer"]) == mathematics.gold_number(number)


def formulas(problem):
    for bracket in (r"\[", r"\]", "$$"):
        problem = problem.replace(bracket, "$")
    return dict.fromkeys(formula.strip(" .,;?") for formula in problem.replace(r"\$", "").split("$")[1::2])


def test_the_task_is_no_answer():
    """Each formula of every second problem of MATH-500 in a box. Equal forms may be the answer to another problem, and
    the right side of an equation that is given is now and then the answer."""
    passed = set()
    for row in list(jsonl("data/math/math500.jsonl"))[::2]:
        bare = [text.replace(" ", "").replace("{", "").replace("}", "") for text in (row["answer"], *formulas(row["problem"]))]
        for text, formula in zip(bare[1:], formulas(row["problem"]), strict=True):
            if formula and text != bare[0] and judge("math", rf"\boxed{{{formula}}}", row["answer"]).reward == 1:
                passed.add(formula)
    equal_forms = {r"\frac{3}{20}", r"\frac{9}{2}", r"\frac{3}{\sqrt{27}}", "ab+5b+2a+10"}
    assert passed == equal_forms | {"a + b + c + d = 0", r"\omega^3 = 1"}


@pytest.mark.parametrize("character", [*"\\{}()[]^_$,.:'\"|/+-*=<> \n#%01aAex½²√−\u2044", r"\text{", r"\frac{1}{2}", "answer\n", "1,", "1 1/"])
def test_time_is_linear(character):
    """20,000 characters."""
    text = character * (20_000 // len(character))
    readers = [mathematics.final_numbers, mathematics.as_latex, mathematics.last_formula, mathematics.tidy]
    readers += [mathematics.without_choice, mathematics.without_base, mathematics.values, mathematics.measures]
    readers += [lambda text: mathematics.without_unit("1" + text, True), lambda text: mathematics.is_task(text, "5")]
    for reader in readers:
        assert seconds_of(partial(reader, text), enough=0.5) < 0.5
